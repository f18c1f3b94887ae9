"""What the page of `app.py` shows of an l-DAE, without the page: uploads, pictures, nearest images, a Hugging Face Space."""
