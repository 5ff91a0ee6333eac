"""Alembic's entry: runs on the connection that `database.migrate` hands over."""

from alembic import context

from deployments.jobs.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite cannot alter a column in place
)
context.run_migrations()
