"""From an aligner's corrections to preference data and to the next policy."""
