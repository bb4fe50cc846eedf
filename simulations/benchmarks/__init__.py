"""Commands that measure speed, memory and utility, each printing its own table."""
