"""`make bench`: this project and its peers, timed in turns on one machine."""
