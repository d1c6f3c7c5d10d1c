"""The commands: each makes a result, which is printed as a page or as one JSON document. planning/ and models/ decide."""
