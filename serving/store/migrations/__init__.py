"""Alembic migrations of the control store, run by `serving.store.engine.upgrade`."""
