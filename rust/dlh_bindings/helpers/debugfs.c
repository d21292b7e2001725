// SPDX-License-Identifier: GPL-2.0
/*
 * Files in debugfs that hold the module while they are open. They have the owner that files of the kernel
 * crate lack, and what a reader gets is made first and copied to it then: nobody who removes a file waits
 * for a reader's memory.
 *
 * debugfs_create_file_unsafe() leaves it to us to keep what is behind a file: between debugfs_file_get()
 * and debugfs_file_put() the struct dlh_file is there, and debugfs_remove() waits; afterwards
 * debugfs_file_get() fails with -EIO. A release may come long after the removal, so it touches what belongs
 * to the open file only.
 */

#include <linux/debugfs.h>
#include <linux/fs.h>
#include <linux/minmax.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "../helpers.h"

/* The text that an open file shows, as it was when it was last read from the beginning. */
struct dlh_text {
	/* For threads that share the open file. */
	struct mutex lock;
	bool made;
	char *bytes;
	size_t length;
	size_t room;
};

/* May sleep. */
int dlh_text_append(struct dlh_text *text, const char *bytes, size_t length)
{
	if (length > text->room - text->length) {
		size_t room = max3(2 * text->room, text->length + length, PAGE_SIZE);
		char *larger = kvrealloc(text->bytes, room, GFP_KERNEL);

		if (!larger)
			return -ENOMEM;
		text->bytes = larger;
		text->room = room;
	}
	memcpy(text->bytes + text->length, bytes, length);
	text->length += length;
	return 0;
}

static const struct dlh_file *behind(struct file *file)
{
	return file_inode(file)->i_private;
}

static int text_make(struct file *file, struct dlh_text *text)
{
	int err = debugfs_file_get(file->f_path.dentry);

	if (err)
		return err;
	text->made = false;
	text->length = 0;
	err = behind(file)->show(behind(file)->data, text);
	debugfs_file_put(file->f_path.dentry);
	text->made = !err;
	return err;
}

static int text_open(struct inode *inode, struct file *file)
{
	struct dlh_text *text = kzalloc(sizeof(*text), GFP_KERNEL);

	if (!text)
		return -ENOMEM;
	mutex_init(&text->lock);
	file->private_data = text;
	return 0;
}

static ssize_t text_read(struct file *file, char __user *to, size_t bytes, loff_t *offset)
{
	struct dlh_text *text = file->private_data;
	ssize_t done = 0;

	if (mutex_lock_killable(&text->lock))
		return -EINTR;
	if (!*offset || !text->made)
		done = text_make(file, text);
	if (!done)
		done = simple_read_from_buffer(to, bytes, offset, text->bytes, text->length);
	mutex_unlock(&text->lock);
	return done;
}

static int text_release(struct inode *inode, struct file *file)
{
	struct dlh_text *text = file->private_data;

	kvfree(text->bytes);
	kfree(text);
	return 0;
}

static const struct file_operations text_ops = {
	.owner = THIS_MODULE,
	.open = text_open,
	.read = text_read,
	.llseek = default_llseek,
	.release = text_release,
};

static ssize_t binary_read(struct file *file, char __user *to, size_t bytes, loff_t *offset)
{
	size_t room = min(bytes, PAGE_SIZE);
	ssize_t done;
	void *piece;

	if (!room)
		return 0;
	piece = kzalloc(room, GFP_KERNEL);
	if (!piece)
		return -ENOMEM;
	done = debugfs_file_get(file->f_path.dentry);
	if (!done) {
		done = behind(file)->read(behind(file)->data, *offset, piece, room);
		debugfs_file_put(file->f_path.dentry);
	}
	if (done > 0) {
		if (copy_to_user(to, piece, done))
			done = -EFAULT;
		else
			*offset += done;
	}
	kfree(piece);
	return done;
}

static const struct file_operations binary_ops = {
	.owner = THIS_MODULE,
	.read = binary_read,
	.llseek = default_llseek,
};

static ssize_t sink_write(struct file *file, const char __user *from, size_t bytes, loff_t *offset)
{
	char piece[DLH_SINK_BYTES];
	ssize_t err;

	if (bytes > sizeof(piece))
		return -E2BIG;
	if (copy_from_user(piece, from, bytes))
		return -EFAULT;
	err = debugfs_file_get(file->f_path.dentry);
	if (err)
		return err;
	err = behind(file)->write(behind(file)->data, piece, bytes);
	debugfs_file_put(file->f_path.dentry);
	return err ?: bytes;
}

static const struct file_operations sink_ops = {
	.owner = THIS_MODULE,
	.write = sink_write,
};

/* Below the directory parent, or the root. What fails is an error pointer, which all of these take. May sleep. */
struct dentry *dlh_debugfs_dir(const char *name, struct dentry *parent)
{
	return debugfs_create_dir(name, parent);
}

/* file has one of the three callbacks, and stays until the entry has been removed. May sleep. */
struct dentry *dlh_debugfs_file(const char *name, struct dentry *parent, const struct dlh_file *file)
{
	const struct file_operations *ops = file->show ? &text_ops : file->read ? &binary_ops : &sink_ops;

	return debugfs_create_file_unsafe(name, file->write ? 0200 : 0444, parent, (void *)file, ops);
}

/* On return nobody is in a callback of the file, nor will be. May sleep. */
void dlh_debugfs_remove(struct dentry *entry)
{
	debugfs_remove(entry);
}

/* Whether there is something of this name in the directory. May sleep. */
bool dlh_debugfs_has(struct dentry *parent, const char *name)
{
	struct dentry *found = debugfs_lookup(name, parent);

	dput(found);
	return found;
}
