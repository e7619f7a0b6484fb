"""The process that holds one model version and runs batches."""
