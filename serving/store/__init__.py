"""The control store: schema, migrations, SQL."""
