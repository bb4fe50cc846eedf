"""The coordinator: certificates, registered sites, and Flower's services between institutions."""
