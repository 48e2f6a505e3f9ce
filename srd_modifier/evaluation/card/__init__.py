"""The model card of a directory, made of what its files say and of what was measured on exactly these files.

contents   what the directory holds, from its headers
measured   the rows of a comparison that belong to it, by digest
metadata   the front matter, through huggingface_hub's own classes
usage      how to load what is there
sections   the text
markdown   code in Markdown
write      all of it together: write_card
"""
