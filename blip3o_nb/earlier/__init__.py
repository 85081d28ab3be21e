"Formats and words of earlier work"
