"""The coordinator's side: public prior, strategy, synthesis, regressor, evaluation, report, the ServerApp."""
