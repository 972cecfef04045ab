"""A survey's measurements on several processes and hosts, through Ray: `cluster` (which one), `hosts` (may a host take part, how much runs
on it), `scheduler` (who does what), `worker` (what they do)."""
