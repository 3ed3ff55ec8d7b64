"""Tests of the strategies, and in `strategies.fits` the models and trainers that other folders use too."""
