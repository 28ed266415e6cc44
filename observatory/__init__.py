"""A service under load and faults, scraped by a real Prometheus: ``python -m observatory``."""
