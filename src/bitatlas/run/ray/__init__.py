"""A survey's measurements on several processes and hosts, through Ray: cluster.py (which there is), place.py (may a host take part?),
crew.py (who does what), worker.py (what they do)."""
