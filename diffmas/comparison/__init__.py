"""Methods side by side on tasks and seeds: records, statistics, tables."""
