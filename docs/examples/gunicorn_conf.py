"""Start with: gunicorn -c gunicorn_conf.py serve_app:app."""

from uvicorn_worker import UvicornWorker


class Worker(UvicornWorker):
    """uvicorn, which by itself waits for its requests without an end."""

    CONFIG_KWARGS = UvicornWorker.CONFIG_KWARGS | {"timeout_graceful_shutdown": 15}


bind = "127.0.0.1:8000"
worker_class = Worker
workers = 4
preload_app = True  # imports the application once, before the forks; nothing connects there
graceful_timeout = 25  # above timeout_graceful_shutdown + drain_timeout; then SIGKILL
max_requests = 10_000  # a worker's requests until another takes its place
max_requests_jitter = 1_000
