"""A survey's measurements on several processes and hosts, through Ray: cluster.py (whom there is), crew.py (who does what), worker.py (what they do)."""
