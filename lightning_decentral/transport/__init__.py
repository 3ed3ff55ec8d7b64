"""The interpreters that answer an algorithm's requests: process group, simulator, planner."""
