"""Every problem with the settings is in one error, when the engine is made."""

import os

from poolkit import ConfigurationError, create_async_engine

os.environ["DATABASE_URL"] = "postgresql://app:secret@db.example.com/app?pool_size=5"
os.environ["DATABASE_STATEMENT_TIMEOUT"] = "ten"
os.environ["DATABASE_POOL_SIZE"] = "0"

try:
    create_async_engine()
except ConfigurationError as error:
    print(error)
