"""`workpool demo`: a control plane and two workers, one of which is killed."""
