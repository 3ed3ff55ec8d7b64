"""Pictures that commands and callbacks draw: curves of runs, step times of plans, timelines of workers."""
