"""From a request for text to the text: generation, queue, stop strings, chat templates."""
