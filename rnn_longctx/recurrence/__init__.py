"""Recurrences, and what all of them share: a policy, gates as data, carries, statistics, backends."""
