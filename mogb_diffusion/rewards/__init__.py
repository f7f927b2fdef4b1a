"""Rewards: one file each, imported only when its reward is asked for."""
