"""What the paper claims: the numbers and verdicts of its findings, one module for each study."""
