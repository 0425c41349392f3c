"""What applications on a device notice: fairness, conversations, structured output, repetition, a lost edge."""
