"""Rooms behind `preflight`: what a run will need in memory, time and disk, before its first step."""
