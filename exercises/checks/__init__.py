"""One module a chapter: cases, hints, wrong and right answers of its exercises."""
