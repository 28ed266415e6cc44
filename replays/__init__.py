"""Outages replayed: the same fault for poolkit and for what people use today, drawn from the run.

``python -m replays`` writes ``docs/replays``; ``tests/replays`` runs poolkit's part and holds it to
what the pages say.
"""
