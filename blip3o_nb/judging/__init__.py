"How good, beside what, and how surely"
