"""Engine `auto`: which engines could serve the target model here, how fast each is, and which one is taken."""
