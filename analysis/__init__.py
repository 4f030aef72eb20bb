"""From run records to tables, plots and notebooks: reads ``record.json`` files, never trains."""
