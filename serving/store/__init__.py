"""The control store: what the controller must not forget, in SQLite or PostgreSQL."""
