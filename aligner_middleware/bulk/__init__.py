"""Very many answers: jobs with a journal, whose rows this process corrects or workers on Ray."""
