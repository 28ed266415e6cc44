"""What poolkit's pool gains, side by side with what people use today: ``python -m benchmarks``."""
