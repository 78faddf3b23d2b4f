"""What a system answers: records, trace controls, methods, inspection."""
