"""Commands of anytime training: finished models of a run that goes on, and of small runs that predict a large one."""
