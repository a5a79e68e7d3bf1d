"""One judge an exercise, by chapter; `test_references` asks them all."""
