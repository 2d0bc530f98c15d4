/** What a virtual host says on its console when it goes to sleep and when it goes on: whoever runs it wakes it. */
export const SUSPENDS = 'the virtual host suspends';
export const RESUMED = 'the virtual host goes on';
