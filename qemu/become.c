// SPDX-License-Identifier: Apache-2.0
/*
 * A function for make: $(become PROGRAM ARGUMENT...,VARIABLE...) replaces make by the program and passes it these variables
 * as they were written, without expanding them. It is how `make run` ends with the status of the command in the guest: make itself knows no status
 * for a failed recipe but 2, and says so on stderr.
 */
#include <gnumake.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int plugin_is_GPL_compatible;

static char *become(const char *name, unsigned count, char **values)
{
	char *words[16];
	size_t length = 0;

	(void)name;
	(void)count;
	for (char *word = strtok(values[0], " "); word && length < 15; word = strtok(NULL, " "))
		words[length++] = word;
	words[length] = NULL;
	for (char *variable = strtok(values[1], " "); variable; variable = strtok(NULL, " ")) {
		char expression[128];
		snprintf(expression, sizeof(expression), "$(value %s)", variable);
		char *value = gmk_expand(expression);
		if (*value)
			setenv(variable, value, 1);
		gmk_free(value);
	}
	fflush(stdout);
	execvp(words[0], words);
	perror(words[0]);
	exit(125);
}

int become_gmk_setup(const gmk_floc *place)
{
	(void)place;
	gmk_add_function("become", become, 2, 2, GMK_FUNC_DEFAULT);
	return 1;
}
