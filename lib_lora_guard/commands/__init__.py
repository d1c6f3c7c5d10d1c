"""The commands `plan` and `inspect`: files in, tables or JSON out. What they say is decided in planning/ and models/."""
