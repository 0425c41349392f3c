"""Large models on a CPU: random weights in real shapes, and devices that replay drafts."""
