"""The downstream tasks as the server trains them, one folder a task."""
