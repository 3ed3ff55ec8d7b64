"""Drives the program of one worker: what an algorithm asks for is answered with real gradients and real messages."""
