"""Rooms behind `checkpoint` and `stage_folder`: files that are whole or not there, and the end a signal asks for."""
