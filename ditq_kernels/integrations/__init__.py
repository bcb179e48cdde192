"""Where other libraries meet this one; the only package that imports diffusers at module level."""
