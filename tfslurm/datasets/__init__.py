"""From files that somebody wrote to bytes that never change."""
