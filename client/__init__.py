"""Everything that touches patient data: ingest, site policy, ledger, private training, the ClientApp."""
