"""Programs that exports carry: copied as they are, run where the runtime's library is installed. Nothing here is imported by bitatlas."""
