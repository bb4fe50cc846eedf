"""What a site needs to run a study's models on its own test patients, one folder a task; training is the server's."""
