"""The command line: commands, progress, and what they print. No arithmetic on tensors is done here."""
