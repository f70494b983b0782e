"""Rooms behind `metrics`, `held_out` and `watchdog`: screen, picture, trackers, clock; who waits for whom."""
